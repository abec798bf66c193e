"""What a pull tells its caller while it runs: a phase is a file, and its unit is bytes."""

from sartor.progress import Progress, Silent, showing

__all__ = ["Progress", "Silent", "showing"]
