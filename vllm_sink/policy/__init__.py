"""What the user asks for, and what is kept: settings and pure arithmetic."""
