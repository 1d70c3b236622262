"""The front end under its public name; `hear_encoders.nn.frontend` defines it."""

from hear_encoders.nn.frontend import LogMel, clip_statistics, normalize, statistics_of_blocks

__all__ = ["LogMel", "clip_statistics", "normalize", "statistics_of_blocks"]
