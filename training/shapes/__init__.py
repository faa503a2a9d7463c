"""The recipes of the Shapes world: its pipeline and its CLIP, on the trainer."""
