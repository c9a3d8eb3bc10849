"""Reading answers: where in a text they stand, one written form for each, and the numbers and expressions that they are."""
