"""What a compressed model is worth: scores, speed and size; the report, the card and the gate."""
