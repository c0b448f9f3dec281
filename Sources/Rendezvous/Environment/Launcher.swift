/// What starts the processes of a job, and by which variables it tells each who it is.
package enum Launcher: String, CaseIterable, Sendable {
  case swiftep = "swiftep launch"
  case torchrun = "torchrun"
  case openMPI = "OpenMPI's mpirun"
  case pmi = "a launcher with PMI (MPICH's mpirun)"
  case slurm = "SLURM's srun"

  struct Variables {
    /// By one of these the launcher is recognized.
    let signs: [String]
    /// All that are set must say the same.
    let rank: [String]
    /// The first that is set counts.
    let count: [String]
    /// Ranks on this host.
    var localCount: String?
    /// Hosts that have ranks.
    var hostCount: String?
    /// What, taken together, no other job of this user has on this host.
    var job: [String] = []
  }

  var variables: Variables {
    switch self {
    case .swiftep:
      // Its token is the job's own.
      Variables(
        signs: ["SWIFTEP_RANK", "SWIFTEP_RANK_COUNT"], rank: ["SWIFTEP_RANK"], count: ["SWIFTEP_RANK_COUNT"])
    case .torchrun:
      Variables(
        signs: ["RANK", "WORLD_SIZE"], rank: ["RANK"], count: ["WORLD_SIZE"], localCount: "LOCAL_WORLD_SIZE",
        job: ["MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"])
    case .openMPI:
      Variables(
        signs: ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"], rank: ["OMPI_COMM_WORLD_RANK", "PMIX_RANK"],
        count: ["OMPI_COMM_WORLD_SIZE"], localCount: "OMPI_COMM_WORLD_LOCAL_SIZE", job: ["PMIX_NAMESPACE"])
    case .pmi:
      Variables(
        signs: ["PMI_RANK", "PMI_SIZE"], rank: ["PMI_RANK"], count: ["PMI_SIZE"], localCount: "MPI_LOCALNRANKS",
        hostCount: "SLURM_STEP_NUM_NODES", job: ["PMI_JOBID", "SLURM_JOB_ID", "SLURM_STEP_ID"])
    case .slurm:
      Variables(
        signs: ["SLURM_PROCID"], rank: ["SLURM_PROCID"], count: ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"],
        hostCount: "SLURM_STEP_NUM_NODES", job: ["SLURM_JOB_ID", "SLURM_STEP_ID"])
    }
  }

  /// The launcher of a process with these variables: the first that is recognized.
  package static func find(in environment: [String: String]) -> Launcher? {
    allCases.first { launcher in launcher.variables.signs.contains { environment[$0] != nil } }
  }
}
