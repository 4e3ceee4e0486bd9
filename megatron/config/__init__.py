"""Configuration: sections, flags, recipes, compatibility and the plan of a run."""
