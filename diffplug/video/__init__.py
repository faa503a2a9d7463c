"""What a video's frames say about themselves: colour, sharpness, motion, and how they change."""
