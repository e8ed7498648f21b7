"""Load on a running server, and what it took: Locust users over gRPC, scenarios as data, a comparison of modes.

locustfile.py, users.py   what Locust runs; only these import it, as that patches the process
scenario.py, draws.py     a scenario, and the requests that it draws
streams.py, records.py    one timed stream, and what many of them say
serving.py, run.py        a server of its own, and Locust as a process against it
echo.py                   a server that computes nothing: what Locust itself takes
modes.py, compare.py, report/   the same scenario on every kind of base, as a report
overload.py, cpu.py       the load that a server accepts, and several times that; whose CPU time it took
"""
