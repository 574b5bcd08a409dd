"""Inject faults under load into the whole product: real Triton, real services, a real load balancer, known answers.

``make chaos`` runs all scenarios and prints one table; `test_chaos` runs the same scenarios with small numbers.
"""
