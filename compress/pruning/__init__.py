"""What is cut, by which score and within which budget, how, and the proof of it."""
