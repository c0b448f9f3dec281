export PYTHONPATH=/tmp/py
for i in 1 2; do python3 Python/benchmarks/overhead.py --calls 4000 --torch; python3 Python/benchmarks/overhead.py --calls 2000 --device cuda --torch; done
