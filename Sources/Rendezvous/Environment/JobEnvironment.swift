/// Who a process is in its job, and where it finds the others, as the variables of its environment tell.
package struct JobEnvironment: Sendable {
  package let launcher: Launcher
  package let rank: Int
  package let rankCount: Int
  package let meetingPlace: MeetingPlace

  package init(_ environment: [String: String]) throws(InputFault) {
    guard let launcher = Launcher.find(in: environment) else {
      throw InputFault(
        "environment", expected: "SWIFTEP_RANK and SWIFTEP_RANK_COUNT, or the variables of torchrun, mpirun or srun",
        found: "none of them")
    }
    let variables = launcher.variables
    self.launcher = launcher
    let countName = variables.count.first { environment[$0] != nil } ?? variables.count[0]
    rankCount = try integer(countName, in: 1...Seat.countMax, environment)
    rank = try integer(variables.rank[0], in: 0...rankCount - 1, environment)
    for name in variables.rank.dropFirst() where environment[name] != nil {
      let other = try integer(name, in: 0...rankCount - 1, environment)
      if other != rank {
        throw InputFault(name, expected: "\(rank), as \(variables.rank[0]) has", found: "\(other)")
      }
    }
    if let name = variables.localCount, environment[name] != nil {
      let localCount = try integer(name, in: 1...rankCount, environment)
      if localCount != rankCount {
        throw InputFault(
          name, expected: "\(rankCount), as \(countName) has, since ranks on several hosts are not supported yet",
          found: "\(localCount)")
      }
    }
    if let name = variables.hostCount, environment[name] != nil {
      let hostCount = try integer(name, in: 1...Int(Int32.max), environment)
      if hostCount != 1 {
        throw InputFault(
          name, expected: "1, since ranks on several hosts are not supported yet", found: "\(hostCount)")
      }
    }
    meetingPlace = try Self.meetingPlace(environment)
  }

  /// Where the processes of the job meet: all that a process has to know that joins them later.
  package static func meetingPlace(_ environment: [String: String]) throws(InputFault) -> MeetingPlace {
    let token = try token(environment)
    if let text = environment["SWIFTEP_ADDRESS"] {
      return MeetingPlace(token: token, address: try HostAndPort(text, from: "SWIFTEP_ADDRESS"))
    }
    return MeetingPlace(token: token, job: jobName(environment))
  }

  /// The same in all processes of a job, and no other job's.
  static func jobName(_ environment: [String: String]) -> String {
    guard let launcher = Launcher.find(in: environment) else { return "" }
    let names = launcher.variables.job.filter { environment[$0] != nil }
    // Which variable a value belongs to is part of the name.
    return names.map { "\($0)=\(environment[$0]!)\n" }.joined()
  }

  private static func token(_ environment: [String: String]) throws(InputFault) -> Token {
    if let text = environment["SWIFTEP_TOKEN"] { return try Token(text, from: "SWIFTEP_TOKEN") }
    if let path = environment["SWIFTEP_TOKEN_FILE"] { return try Token(file: path, from: "SWIFTEP_TOKEN_FILE") }
    throw InputFault(
      "SWIFTEP_TOKEN",
      expected: "a secret that all ranks have, as from: export SWIFTEP_TOKEN=$(swiftep token); or SWIFTEP_TOKEN_FILE",
      found: "neither")
  }
}

private func integer(
  _ name: String, in range: ClosedRange<Int>, _ environment: [String: String]
) throws(InputFault) -> Int {
  let text = environment[name]
  if let text, let value = Int(text), range.contains(value) { return value }
  throw InputFault(
    name, expected: "an integer of \(range.lowerBound) to \(range.upperBound)", found: text.map { "'\($0)'" } ?? "none")
}
