"""Faults under load, against the whole product: real Triton, real services, a real load balancer, known answers.

``make chaos`` runs all of it and prints one table; `test_chaos` runs the same scenarios with small numbers.
"""
