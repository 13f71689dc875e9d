"""Tests of merging; a package, so that they share `cutting`."""
