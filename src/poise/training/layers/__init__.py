"""How a layer holds its weight, and layers that hold it on a sphere."""
