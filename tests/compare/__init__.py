"""Tests of the scale; a package, so that they share `toys`."""
