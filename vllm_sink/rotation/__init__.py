"""How the loaded model rotates its keys: measured, never guessed."""
