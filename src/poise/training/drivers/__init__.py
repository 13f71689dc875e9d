"""The named drivers, one paper a file."""
