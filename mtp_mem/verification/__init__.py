"""The same gradient: every strategy against an fp64 oracle, in scenarios that have caught bugs."""
