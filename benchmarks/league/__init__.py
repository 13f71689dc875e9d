"""The league table: every rule of the catalog weighed on small tasks, and what became of what was published about them."""
