"""The Prefect flows: thin, one per file; they call tokencore's front door and say what happened."""
