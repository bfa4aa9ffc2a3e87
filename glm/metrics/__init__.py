"""What a run measured: metrics.jsonl, the console, wandb, and the report made of them."""
