"""Torture: the whole system under faults, in virtual time or on real servers, and checkers that stand apart.

schedule = what happens when, drawn from a seed       faults.py, jobs.py, schedule.py
production step()s over in-process adapters,          fate.py, disk.py, network.py, store.py, processes.py,
each wrapped so that it can fail                      device.py, system.py, task.py, meters.py, simulator.py
what anybody could see of it                          history.py
judged by three checkers                              ledger.py, oracle.py, mass.py
a failure becomes short, and a regression test        shrink.py
the same promises on real servers                    servers.py, server_*.py, proxy.py
`fedmq torture`                                       command.py, account.py
"""
