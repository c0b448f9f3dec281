tar -C /tmp -xJf .gpu/k/checked.tar.xz; export SWIFTEP_FLIGHT_RECORDER=off
tool=$(find /tmp/py -name swiftep -type f | head -1); chmod +x $tool
for t in memcheck synccheck; do SWIFTEP_KERNELS=/tmp/checked timeout 100 /usr/local/cuda/bin/compute-sanitizer --tool $t $tool verify --machine cuda --one-launch --seconds 50 --seed 5 > /tmp/$t.log 2>&1; echo "$t rc $?"; tail -3 /tmp/$t.log | cut -c1-300; done
