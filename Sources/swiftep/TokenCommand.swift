import SwiftEP

let tokenCommand = Command(
  name: "token", summary: "prints a new secret by which the processes of a job know each other",
  flags: [],
  notes: """
    256 random bits, in hexadecimal. For ranks that mpirun, torchrun or srun starts:
      export SWIFTEP_TOKEN=$(swiftep token)
    or, where others may read your environment, in a file that only you can read:
      (umask 077; swiftep token >FILE); export SWIFTEP_TOKEN_FILE=FILE
    """,
  body: { _ in print(try JobToken.random().secretText) })
