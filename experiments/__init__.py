"""What is tried: workloads, sweeps and studies."""
