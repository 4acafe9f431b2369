"""The running system on one machine: Prefect's server, the deployments and a worker, for real or as a demo."""
