"""The rotation of the loaded model's keys: measured, never guessed."""
