use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};

/// Keys and ids are in this process's memory: no core dump may keep them, and no other process
/// of the same user may read them. Returns what could not be arranged.
pub fn keep_memory_private() -> Vec<String> {
    let mut problems = Vec::new();
    let none = Rlimit {
        current: Some(0),
        maximum: getrlimit(Resource::Core).maximum.map(|_| 0).or(Some(0)),
    };
    if let Err(error) = setrlimit(Resource::Core, none) {
        problems.push(format!("core dumps could not be turned off: {error}"));
    }
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        problems.push(format!("the process could not be made undumpable: {error}"));
    }
    problems
}
