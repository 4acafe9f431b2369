"""What messages say, one file per language with the same keys: a translator needs to look nowhere else."""
