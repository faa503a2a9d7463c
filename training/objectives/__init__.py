"""What training makes small: one file a method."""
