import Glibc
import Testing

@testable import Rendezvous

@Suite struct EnvironmentTests {
  static let token = ["SWIFTEP_TOKEN": "0123456789abcdef0123456789abcdef"]

  static func make(_ variables: [String: String]) throws(InputFault) -> JobEnvironment {
    try JobEnvironment(token.merging(variables) { $1 })
  }

  static let torchrun = [
    "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
  ]
  static let openMPI = [
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "3", "PMIX_RANK": "2",
    "PMIX_NAMESPACE": "2213478401",
  ]
  static let pmi = ["PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"]
  static let slurm = [
    "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "1",
  ]
  static let own = ["SWIFTEP_RANK": "5", "SWIFTEP_RANK_COUNT": "6"]

  @Test(arguments: [
    (own, Launcher.swiftep, 5, 6, ""),
    (torchrun, .torchrun, 1, 4, "MASTER_ADDR=localhost\nMASTER_PORT=29500\nTORCHELASTIC_RUN_ID=none\n"),
    (["RANK": "0", "WORLD_SIZE": "1"], .torchrun, 0, 1, ""),
    (openMPI, .openMPI, 2, 3, "PMIX_NAMESPACE=2213478401\n"),
    (pmi, .pmi, 0, 2, ""),
    (slurm, .slurm, 3, 4, "SLURM_JOB_ID=77\nSLURM_STEP_ID=0\n"),
    (["SLURM_PROCID": "3", "SLURM_NTASKS": "8"], .slurm, 3, 8, ""),
    // One within another.
    (slurm.merging(pmi) { $1 }, .pmi, 0, 2, "SLURM_JOB_ID=77\nSLURM_STEP_ID=0\n"),
    (slurm.merging(openMPI) { $1 }, .openMPI, 2, 3, "PMIX_NAMESPACE=2213478401\n"),
    (
      openMPI.merging(torchrun) { $1 }, .torchrun, 1, 4,
      "MASTER_ADDR=localhost\nMASTER_PORT=29500\nTORCHELASTIC_RUN_ID=none\n"
    ),
    (slurm.merging(torchrun) { $1 }.merging(own) { $1 }, .swiftep, 5, 6, ""),
  ])
  func launchers(
    _ variables: [String: String], _ launcher: Launcher, _ rank: Int, _ rankCount: Int, _ job: String
  ) throws {
    let found = try Self.make(variables)
    #expect(found.launcher == launcher && found.rank == rank && found.rankCount == rankCount)
    #expect(JobEnvironment.jobName(variables) == job)
  }

  @Test(arguments: [
    ([:], "environment: expected SWIFTEP_RANK and SWIFTEP_RANK_COUNT, or the variables of torchrun"),
    (["SWIFTEP_RANK": "0"], "SWIFTEP_RANK_COUNT: expected an integer of 1 to 4096, found none"),
    (["SWIFTEP_RANK_COUNT": "2"], "SWIFTEP_RANK: expected an integer of 0 to 1, found none"),
    (own.merging(["SWIFTEP_RANK": "6"]) { $1 }, "SWIFTEP_RANK: expected an integer of 0 to 5, found '6'"),
    (own.merging(["SWIFTEP_RANK": "-1"]) { $1 }, "SWIFTEP_RANK: expected an integer of 0 to 5, found '-1'"),
    (
      own.merging(["SWIFTEP_RANK_COUNT": "two"]) { $1 },
      "SWIFTEP_RANK_COUNT: expected an integer of 1 to 4096, found 'two'"
    ),
    (
      own.merging(["SWIFTEP_RANK_COUNT": "0"]) { $1 }, "SWIFTEP_RANK_COUNT: expected an integer of 1 to 4096, found '0'"
    ),
    (own.merging(["SWIFTEP_RANK_COUNT": "99999999999999999999"]) { $1 }, "SWIFTEP_RANK_COUNT: expected"),
    (["RANK": "0"], "WORLD_SIZE: expected an integer of 1 to 4096, found none"),
    (
      torchrun.merging(["LOCAL_WORLD_SIZE": "2"]) { $1 },
      "LOCAL_WORLD_SIZE: expected 4, as WORLD_SIZE has, since ranks on several hosts are not supported yet, found 2"
    ),
    (torchrun.merging(["LOCAL_WORLD_SIZE": "8"]) { $1 }, "LOCAL_WORLD_SIZE: expected an integer of 1 to 4, found '8'"),
    (["OMPI_COMM_WORLD_RANK": "0"], "OMPI_COMM_WORLD_SIZE: expected an integer of 1 to 4096, found none"),
    (openMPI.merging(["PMIX_RANK": "1"]) { $1 }, "PMIX_RANK: expected 2, as OMPI_COMM_WORLD_RANK has, found 1"),
    (
      openMPI.merging(["OMPI_COMM_WORLD_LOCAL_SIZE": "1"]) { $1 },
      "OMPI_COMM_WORLD_LOCAL_SIZE: expected 3, as OMPI_COMM_WORLD_SIZE has, since ranks on several hosts are not"
    ),
    (pmi.merging(["MPI_LOCALNRANKS": "1"]) { $1 }, "MPI_LOCALNRANKS: expected 2, as PMI_SIZE has"),
    (["SLURM_PROCID": "0"], "SLURM_STEP_NUM_TASKS: expected an integer of 1 to 4096, found none"),
    (slurm.merging(["SLURM_PROCID": "4"]) { $1 }, "SLURM_PROCID: expected an integer of 0 to 3, found '4'"),
    (
      slurm.merging(["SLURM_STEP_NUM_NODES": "2"]) { $1 },
      "SLURM_STEP_NUM_NODES: expected 1, since ranks on several hosts are not supported yet, found 2"
    ),
    (
      own.merging(["SWIFTEP_ADDRESS": "localhost"]) { $1 },
      "SWIFTEP_ADDRESS: expected host:port or [v6]:port, with a port of 1 to 65535, found 'localhost'"
    ),
    (
      own.merging(["SWIFTEP_TOKEN": "short"]) { $1 },
      "SWIFTEP_TOKEN: expected a token of 16 to 1024 bytes, found one of 5"
    ),
  ])
  func faults(_ variables: [String: String], _ sentence: String) {
    let fault = #expect(throws: InputFault.self) { try Self.make(variables) }
    #expect(fault?.description.hasPrefix(sentence) == true, "\(fault?.description ?? "")")
  }

  @Test func noToken() {
    let fault = #expect(throws: InputFault.self) { try JobEnvironment(Self.own) }
    #expect(
      fault?.description
        == "SWIFTEP_TOKEN: expected a secret that all ranks have, as from: export SWIFTEP_TOKEN=$(swiftep token); "
        + "or SWIFTEP_TOKEN_FILE, found neither")
  }

  // MARK: Addresses

  @Test(arguments: [
    ("localhost:1", "localhost", 1), ("10.0.0.1:65535", "10.0.0.1", 65535), ("[::1]:80", "::1", 80),
    ("[fe80::1%eth0]:80", "fe80::1%eth0", 80),
  ])
  func addresses(_ text: String, _ host: String, _ port: UInt16) throws {
    let address = try HostAndPort(text, from: "a test")
    #expect(address.host == host && address.port == port)
    #expect(address.description == text)
  }

  @Test(arguments: [
    "", ":", "host", "host:", ":80", "host:0", "host:65536", "host:-1", "host:+1", "host:80x", "::1:80", "[::1]",
    "[::1]80", "[]:80", "[::1:80", "a b:80", "host:80:90", "host: 80", "h\0st:80",
  ])
  func badAddresses(_ text: String) {
    let fault = #expect(throws: InputFault.self) { try HostAndPort(text, from: "SWIFTEP_ADDRESS") }
    #expect(fault?.subject == "SWIFTEP_ADDRESS" && fault?.found == "'\(text)'")
  }

  // MARK: Token files

  /// A file in a folder of its own, gone with it.
  final class TokenFile {
    let folder: String
    var path: String { folder + "/token" }

    init(_ text: String = "0123456789abcdef\n", mode: mode_t = 0o600) {
      var template = Array("/tmp/swiftep-token-XXXXXX".utf8CString)
      folder = String(cString: mkdtemp(&template))
      let file = open(path, O_CREAT | O_WRONLY, 0o600)
      _ = text.withCString { write(file, $0, strlen($0)) }
      fchmod(file, mode)
      close(file)
    }

    deinit {
      unlink(path)
      rmdir(folder)
    }
  }

  func fault(_ path: String) -> String? {
    #expect(throws: InputFault.self) { try Token(file: path, from: "SWIFTEP_TOKEN_FILE") }?.description
  }

  @Test(arguments: [0o600, 0o400, 0o700] as [mode_t])
  func goodFiles(_ mode: mode_t) throws {
    let file = TokenFile(mode: mode)
    #expect(try Token(file: file.path, from: "a test") == Token("0123456789abcdef", from: "a test"))
    let job = try JobEnvironment(Self.own.merging(["SWIFTEP_TOKEN_FILE": file.path]) { $1 })
    #expect(job.rank == 5)
  }

  @Test(arguments: [0o640, 0o604, 0o620, 0o666, 0o610] as [mode_t])
  func filesThatOthersReach(_ mode: mode_t) {
    let file = TokenFile(mode: mode)
    let expected = "expected a file that only its owner can read or write (mode 600)"
    #expect(
      fault(file.path) == "SWIFTEP_TOKEN_FILE: \(expected), found \(file.path), of mode \(String(mode, radix: 8))")
  }

  @Test func filesThatAreNone() {
    let file = TokenFile()
    let pipe = file.folder + "/pipe"
    mkfifo(pipe, 0o600)
    defer { unlink(pipe) }
    #expect(fault(pipe) == "SWIFTEP_TOKEN_FILE: expected a regular file, found \(pipe), which is none")
    #expect(fault(file.folder)?.contains("expected a regular file") == true)
    #expect(fault("/nonexistent")?.contains("found /nonexistent: No such file or directory") == true)
  }

  @Test func anothersFile() {
    let file = TokenFile()
    // Only root can give files away; everybody else finds one that root has.
    let path = geteuid() == 0 ? file.path : "/etc/passwd"
    if geteuid() == 0 { chown(path, 65534, 65534) }
    #expect(fault(path)?.hasPrefix("SWIFTEP_TOKEN_FILE: expected a file of this user, \(geteuid()), found") == true)
  }

  @Test(arguments: [("", 0), ("short\n", 5), (String(repeating: "x", count: 5000), 1089)])
  func badTexts(_ text: String, _ count: Int) {
    let file = TokenFile(text)
    #expect(
      fault(file.path)
        == "SWIFTEP_TOKEN_FILE \(file.path): expected a token of 16 to 1024 bytes, found one of \(count)")
  }

  @Test func tokensAreRandomAndLong() throws {
    let tokens = try (0..<50).map { _ in try Token.random().text }
    #expect(Set(tokens).count == 50)
    #expect(tokens.allSatisfy { $0.count == 64 && $0.allSatisfy(\.isHexDigit) })
  }

  // MARK: Ports

  @Test func portsAreThoseOfTheJob() throws {
    let token = try Token(Self.token["SWIFTEP_TOKEN"]!, from: "a test")
    let ports = token.key(for: "a").ports(count: 6)
    #expect(ports == token.key(for: "a").ports(count: 6))
    #expect(ports != token.key(for: "b").ports(count: 6))
    #expect(ports != (try Token.random()).key(for: "a").ports(count: 6))
    #expect(ports.allSatisfy { (12288..<32768).contains($0) })
  }
}
