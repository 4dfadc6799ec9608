"""Known bugs of parallel training, planted one by one: does a test catch each? `make mutants`."""
