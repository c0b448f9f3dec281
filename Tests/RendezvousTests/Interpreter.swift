#if !FUZZER
  @testable import Rendezvous
#endif

/// Runs bytes as a program of things that happen to a simulation, for a fuzzer and its corpus.
struct Interpreter {
  private var program: ArraySlice<UInt8>
  private var simulation: Simulation
  private var strangers: [Server.Connection] = []

  private enum Operation: UInt8, CaseIterable {
    case connect, connectToStranger, refuse, deliverToServer, deliverToClient, cut, corrupt, inject, accept, receive
    case replayToServer, replayToClient, end, tick, longTick, settle, crowd
  }

  /// Returns what must not have happened.
  static func run(_ program: [UInt8]) -> [String] {
    var interpreter = Interpreter(program)
    interpreter.run()
    return interpreter.simulation.violations
  }

  private init(_ bytes: [UInt8]) {
    program = bytes[...]
    var options = Simulation.Options()
    let (first, wrong) = (program.popFirst() ?? 0, program.popFirst() ?? 0)
    options.count = 2 + Int(first % 4)
    options.placeCount = 1 + Int((first >> 2) % 3)
    // Most often all know the token and agree.
    if wrong < 16 { options.withoutToken = [1 + Int(wrong) % (options.count - 1)] }
    if (16..<32).contains(wrong) { options.seats = [1: Seat(room: "join", index: 1, of: options.count)] }
    if (32..<48).contains(wrong) { options.seats = [1: Seat(room: "start", index: 1, of: options.count + 1)] }
    if (48..<64).contains(wrong), options.count > 2 {
      options.seats = [1: Seat(room: "start", index: 2, of: options.count)]
    }
    simulation = Simulation(options)
  }

  private mutating func byte() -> Int { Int(program.popFirst() ?? 0) }

  private mutating func client() -> Int { 1 + byte() % (simulation.options.count - 1) }

  private mutating func literal() -> [UInt8] {
    let count = byte()
    let bytes = program.prefix(count)
    program.removeFirst(bytes.count)
    return Array(bytes)
  }

  /// What was sent over an earlier connection, or the beginning of it.
  private mutating func recording(_ recordings: [[UInt8]]) -> [UInt8] {
    let (which, count) = (byte(), byte())
    guard !recordings.isEmpty else { return [] }
    let whole = recordings[which % recordings.count]
    return count == 255 ? whole : Array(whole.prefix(count))
  }

  private mutating func stranger() -> Server.Connection? {
    let which = byte()
    return strangers.isEmpty ? nil : strangers[which % strangers.count]
  }

  private mutating func run() {
    // Long programs only repeat themselves.
    for _ in 0..<200 {
      guard let code = program.popFirst(), simulation.violations.isEmpty else { break }
      step(Operation.allCases[Int(code) % Operation.allCases.count])
    }
    simulation.finish()
  }

  private mutating func step(_ operation: Operation) {
    switch operation {
    case .connect: simulation.connect(client())
    case .connectToStranger: simulation.connect(client(), toStranger: true)
    case .refuse: simulation.refuse(client())
    case .deliverToServer: simulation.deliverToServer(client(), count())
    case .deliverToClient: simulation.deliverToClient(client(), count())
    case .cut: simulation.cut(client())
    case .corrupt:
      simulation.corrupt(client(), toServer: byte() % 2 == 0, at: byte(), UInt8(max(1, byte())))
    case .inject: simulation.inject(literal(), client(), toServer: byte() % 2 == 0)
    case .accept: strangers.append(simulation.acceptStranger())
    case .receive: if let stranger = stranger() { simulation.receive(literal(), from: stranger) }
    case .replayToServer:
      if let stranger = stranger() { simulation.receive(recording(simulation.recordedToServer), from: stranger) }
    case .replayToClient:
      let index = client()
      simulation.inject(recording(simulation.recordedToClient), index, toServer: false)
    case .end: if let stranger = stranger() { simulation.end(stranger) }
    case .tick: simulation.tick(.milliseconds(byte()))
    case .longTick: simulation.tick(.milliseconds(200 * byte()))
    case .settle: simulation.settle(rounds: byte() % 8)
    case .crowd: for _ in 0..<byte() % 80 { _ = simulation.acceptStranger() }
    }
  }

  private mutating func count() -> Int {
    let count = byte()
    return count == 255 ? .max : count
  }
}
