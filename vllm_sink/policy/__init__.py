"""The settings, and the policy as pure arithmetic."""
