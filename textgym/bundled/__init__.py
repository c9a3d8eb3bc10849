"""The tiny model, prompts and rewards that ship with the package."""
