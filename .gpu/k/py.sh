root=$PWD; for w in .gpu/k/wheels/*.whl; do python3 -m zipfile -e $w /tmp/py; done; chmod +x /tmp/py/swiftep/* 2>/dev/null
export PYTHONPATH=/tmp/py
cd /tmp; python3 -c "import swiftep, swiftep.torch, torch; print(swiftep.__version__, torch.__version__, torch.cuda.get_device_name())" || exit 1
SWIFTEP_TEST_GPUS=1 timeout ${T:-280} python3 -m pytest -q -p no:cacheprovider -o faulthandler_timeout=60 --tb=short --durations=5 $root/Python/tests/test_gpu.py "$@" 2>&1 | tail -n 150 | cut -c1-220
