"""The environments; importing this package registers their ids."""
