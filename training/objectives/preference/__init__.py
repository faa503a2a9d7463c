"""Methods that learn what a reward or people prefer: one file a method."""
