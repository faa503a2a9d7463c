"""What steering claims, measured: exact laws, pictures of the Shapes world, and what the engine costs."""
