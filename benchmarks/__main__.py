"""`python -m benchmarks run [SUITE…]`: Isolator beside what people would use instead (benchmarks.cli).

place      client ─ system ─ server, for every system at once          benchmarks.place
systems    the same policy in each one's language                      benchmarks.systems
suites     what is measured                                            benchmarks.suites
runner     interleaved rounds between checks that the policy is in force
record     medians, ratios, spreads → JSON → report.md, report.html
life       what the agent's own life costs those who are connected     benchmarks.life
"""

from benchmarks.cli import app

app(prog_name="python -m benchmarks")
