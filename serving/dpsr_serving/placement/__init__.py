"""`dpsr place`: decides which model servers hold which models, and moves models between servers.

command.py has the flags and prints the plan, config.py reads the placement file, planner.py computes the plan,
fleet.py talks to the servers, and rollout.py carries the plan out.
"""
