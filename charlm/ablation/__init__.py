"""Many runs that differ in what is said of each, and the table that compares them."""
