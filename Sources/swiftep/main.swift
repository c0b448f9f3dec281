import SwiftEP
