"""What every engine asks before it serves: checks, log lines, the hook."""
