"""Measurements and plots of the repository, each made by one command."""
