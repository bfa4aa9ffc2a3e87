"""What ``glm show`` prints: a resolved recipe, the schedules of a run, the recipe beside the report."""
