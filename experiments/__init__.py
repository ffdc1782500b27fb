"""Experiments: `get_config(arg)` of one file is one experiment."""
