fn main() -> std::process::ExitCode {
    vmkeep::cli::main()
}
