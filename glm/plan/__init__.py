"""What a run needs of each rank, computed without the ranks."""
