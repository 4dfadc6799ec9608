"""A small run killed again and again, in every way and at every moment: `make soak`, and six kills in the tests."""
