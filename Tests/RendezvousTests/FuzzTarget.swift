// What `scripts/fuzz-rendezvous` builds, with the state machines and without their tests.
#if FUZZER
  @c(LLVMFuzzerTestOneInput)
  public func testOneInput(_ bytes: UnsafePointer<UInt8>, _ count: Int) -> CInt {
    let violations = Interpreter.run(Array(UnsafeBufferPointer(start: bytes, count: count)))
    precondition(violations.isEmpty, violations.joined(separator: "\n"))
    return 0
  }
#endif
