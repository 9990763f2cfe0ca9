"""What experiments.py measures with, and the report of what it measured."""
